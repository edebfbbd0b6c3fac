"""Command lines of programs whose flags are not a config's."""

import argparse

from dpcap.errors import UserError


class Parser(argparse.ArgumentParser):
  """Says what is wrong in one line, without the usage."""

  def error(self, message: str):
    """Raises it as a UserError."""
    raise UserError(message)
