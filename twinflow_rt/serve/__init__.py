"""Generation for many callers: `engine` batches them over one pipeline, `app` is its HTTP side."""
