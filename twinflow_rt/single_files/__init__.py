"""Weight files under other names than diffusers': which networks they hold, told beside a base folder of the model."""
