"""How programs start and fail whose flags are not a config's; dpcap.command_line is for those."""

import argparse
import functools
import sys
from collections.abc import Callable

from dpcap.errors import UserError


class Parser(argparse.ArgumentParser):
  """Shows the program's docstring as help; says what is wrong in one line, without the usage.

  Options are never abbreviated.
  """

  def __init__(self, program: str, description: str):
    """`program` is a module, as 'tools.search'."""
    super().__init__(
      prog=f'python -m {program}',
      description=description,
      formatter_class=argparse.RawDescriptionHelpFormatter,
      allow_abbrev=False,
    )

  def error(self, message: str):
    """Raises it as a UserError."""
    raise UserError(message)


def program(main: Callable[[list[str] | None], int | None]) -> Callable[..., int]:
  """A decorator of `main(argv)`: it returns the exit status, 0 where `main` says none.

  What the user got wrong is said in one line, and the status is 2.
  """

  @functools.wraps(main)
  def guarded(argv: list[str] | None = None) -> int:
    try:
      return main(argv) or 0
    except UserError as e:
      print(f'error: {e}', file=sys.stderr)
      return 2

  return guarded
