"""The one error type that means: the user can mend this."""


class UserError(Exception):
    """Something the user can mend: one line that names the field or file, and the fix.

    The command line prints it as ``error: <message>`` and exits with status 2, without a traceback.
    Everything else that is raised is a defect or a broken machine, and fails loudly.
    """
