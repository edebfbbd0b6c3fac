"""The one error that a user, not a programmer, caused."""


class UserError(ValueError):
  """A config, a file or an environment that dpcap refuses, said in one line.

  The message names the key or the file, the value found, and what is allowed.
  The main programs print it without a stack trace and exit with status 2.
  """
