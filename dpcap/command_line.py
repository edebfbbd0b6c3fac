"""How every dpcap program starts and how it fails: one clear line, exit status 2."""

from collections.abc import Callable
import sys

from absl import app
from absl import flags
from absl import logging
from ml_collections import config_flags

from dpcap import config as config_lib
from dpcap.errors import UserError


def run(main: Callable[[], None]) -> None:
  """Parses the flags and calls `main`; what the user got wrong is said in one line."""

  def parse(argv):
    try:
      rest = flags.FLAGS(argv)
    except (flags.Error, UserError, AttributeError, KeyError, TypeError, ValueError, OSError, SyntaxError, ImportError) as e:
      _fail(e)
    if len(rest) > 1:
      _fail(f'unknown argument {rest[1]!r}; flags start with --')
    return rest

  def guarded_main(argv):
    del argv
    try:
      main()
    except UserError as e:
      _fail(e)

  logging.set_verbosity(logging.WARNING)
  app.run(guarded_main, flags_parser=parse)


def define_config() -> flags.FlagHolder:
  """The flag --config=FILE[:argument], any key of which --config.key=value overrides."""
  return config_flags.DEFINE_config_file('config', None, 'Experiment file[:argument].')


def load_config(holder: flags.FlagHolder):
  """The validated, frozen config that the flags name.

  Raises:
    UserError: if there is none, or it does not fit the schema.
  """
  if holder.value is None:
    raise UserError('--config is missing; give an experiment, as --config=configs/demo.py')
  config_lib.validate(holder.value)
  return holder.value


def _fail(reason) -> None:
  text = reason.args[0] if isinstance(reason, KeyError) and reason.args else reason
  print('error:', ' '.join(str(text).split()), file=sys.stderr)
  sys.exit(2)
