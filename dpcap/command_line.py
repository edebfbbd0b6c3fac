"""How every dpcap program starts and how it fails: one clear line, exit status 2."""

import logging as std_logging
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from dpcap import config as config_lib
from dpcap.errors import UserError

# As the flags library has them: --config.key=value, --config.key value, --noconfig.key.
_OVERRIDE = re.compile(r'--?(?:no)?config\.([\w.]+)(?:=(.*))?', re.DOTALL)

_CONFIG_FILE = re.compile(r'--?config=([^:]+).*', re.DOTALL)

# Keys that the command line sets to None last, which the flags library can't express.
_set_to_none: set[str] = set()


def run(main: Callable[[], None]) -> None:
  """Parses the flags and calls `main`; what the user got wrong is said in one line."""

  def guarded_main(argv):
    del argv
    try:
      main()
    except UserError as e:
      _fail(e)

  logging.set_verbosity(logging.WARNING)
  logging.get_absl_handler().addFilter(_is_news)
  threading.excepthook = _background_failure
  app.run(guarded_main, flags_parser=_parse)


def define_config() -> flags.FlagHolder:
  """The flag --config=FILE[:argument], any key of which --config.key=value overrides."""
  return config_flags.DEFINE_config_file('config', None, 'Experiment file[:argument].')


def load_config(holder: flags.FlagHolder) -> ml_collections.ConfigDict:
  """The validated config that the flags name.

  Raises:
    UserError: if there is none, it cannot be loaded, or it does not fit the schema.
  """
  config = holder.value
  if config is None and not holder.present:
    raise UserError('--config is missing; give an experiment, as --config=configs/demo.py')
  try:
    hasattr(config, 'lock')
  except OSError as e:  # a file that can't be loaded is told of on first use
    raise UserError(f'--config: the experiment cannot be loaded ({_last_line(e)})') from e
  if not isinstance(config, ml_collections.ConfigDict):
    raise UserError(
      f'{config_flags.get_config_filename(flags.FLAGS[holder.name])}: get_config returns'
      f' {type(config).__name__}; it must return the ConfigDict that dpcap.config.base_config makes'
    )
  for path in sorted(_set_to_none):
    *sections, key = path.split('.')
    section = config
    for name in sections:
      section = section.get(name, {})
    if key not in section:
      raise UserError(f'--config.{path}: no key of the config')
    section[key] = None
  config_lib.validate(config)
  return config


def _is_news(record) -> bool:
  """Whether a log line says more than the error that the main thread raises from it.

  Orbax and asyncio log a page for every array that could not be written; the flags library warns
  of a config that is None.
  """
  if record.pathname.endswith('config_flags.py'):
    return False  # load_config says it
  is_error = record.levelno >= std_logging.ERROR
  return not (is_error and ('/orbax/' in record.pathname or '/asyncio/' in record.pathname))


def _background_failure(failure) -> None:
  """A disk that fails a background thread (TensorBoard's writer) fails the main thread too."""
  if not issubclass(failure.exc_type, OSError):
    threading.__excepthook__(failure)


def _parse(argv: list[str]) -> list[str]:
  kept = []
  for argument in argv:
    override = _OVERRIDE.fullmatch(argument)
    if override and override[2] == 'None':
      _set_to_none.add(override[1])
    else:
      if override:
        _set_to_none.discard(override[1])
      kept.append(argument)
  try:
    rest = flags.FLAGS(kept)
  except UserError as e:
    _fail(e)
  except (KeyError, AttributeError) as e:
    _fail(_in_config_file(argv, e) or _unknown_key(argv, str(e)))
  # A config file is a program: whatever it raises while it is read ends here.
  except Exception as e:  # pylint: disable=broad-except
    reason = _last_line(e) if 'Traceback' in str(e) else e
    _fail(_in_config_file(argv, e) or reason)
  if len(rest) > 1:
    _fail(f'unknown argument {rest[1]!r}; flags start with --')
  return rest


def _in_config_file(argv: list[str], error: Exception) -> str | None:
  """What is wrong with the experiment file itself and in which line; None: it is something else."""
  given = [match[1] for match in map(_CONFIG_FILE.fullmatch, argv) if match]
  while error.__cause__ or error.__context__:  # as the flags library wraps it
    error = error.__cause__ or error.__context__
  if not given or isinstance(error, (UserError, OSError)):
    return None
  if isinstance(error, SyntaxError):
    return f'{error.filename}:{error.lineno}: {error.msg}'
  path = os.path.abspath(given[-1])
  frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
  if frames:
    return f'{given[-1]}:{frames[-1].lineno}: {type(error).__name__}: {error}'
  if isinstance(error, AttributeError) and "attribute 'get_config'" in str(error):
    return f'{given[-1]}: has no function get_config, which returns the experiment'
  if isinstance(error, TypeError) and str(error).startswith('get_config()'):
    return f'{given[-1]}: {error}; what follows the colon of --config is its argument'
  return None


def _unknown_key(argv: list[str], error: str) -> str:
  """Names the override that the flags library found no key for."""
  names = re.findall(r"'(\w+)'", error.replace('\\', ''))
  hint = re.search(r'Did you mean "(\w+)"', error)
  for argument in argv:
    override = _OVERRIDE.fullmatch(argument)
    if override and names and names[0] in override[1].split('.'):
      text = f'--config.{override[1]}: {names[0]!r} is no key of the config'
      return text + (f' (did you mean {hint[1]}?)' if hint else '')
  return f'the config cannot be loaded ({error})'


def _last_line(error: Exception) -> str:
  line = [line.strip() for line in str(error).splitlines() if line.strip()][-1]
  return line.removeprefix('dpcap.errors.UserError: ')


def _fail(reason) -> None:
  print('error:', ' '.join(str(reason).split()), file=sys.stderr, flush=True)
  # Not sys.exit: what libraries clean up at exit fails again for the same reason, aloud.
  os._exit(2)
