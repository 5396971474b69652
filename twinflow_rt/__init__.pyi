"""The public names with their types, as type checkers and editors read them; __init__.py imports each on first use."""

from .errors import CancelledError as CancelledError
from .errors import CheckpointError as CheckpointError
from .errors import ConfigError as ConfigError
from .errors import DeviceError as DeviceError
from .errors import NonFiniteError as NonFiniteError
from .errors import OutOfMemoryError as OutOfMemoryError
from .errors import PromptTruncatedWarning as PromptTruncatedWarning
from .errors import StorageError as StorageError
from .errors import TwinFlowError as TwinFlowError
from .export.program import export_model as export_model
from .export.runtime import load_exported as load_exported
from .integrations.diffusers import accelerate as accelerate
from .loading import load as load
from .options import LoadOptions as LoadOptions
from .pipeline import Pipeline as Pipeline
from .sampling.guidance import Guidance as Guidance
from .sampling.schedule import PRESETS as PRESETS
from .sampling.schedule import SamplerConfig as SamplerConfig
from .sampling.schedule import preset as preset
from .stages.result import Result as Result
from .stages.text import PromptEmbeds as PromptEmbeds

__version__: str
