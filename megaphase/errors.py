"""The one exception for wrong input; the command line turns it into one line and exit code 2."""

from __future__ import annotations

EXIT_FAILED = 1
EXIT_WRONG_INPUT = 2


class InputError(Exception):
    """Something the user gave is wrong.

    The message is one line that names the file, the key or place in it, and the remedy.
    Nothing has been written, or what was written aside has been removed, when it is raised.
    """

    def __init__(self, where: object, problem: str, remedy: str = "") -> None:
        self.where = str(where)
        self.problem = problem
        self.remedy = remedy
        text = f"{self.where}: {problem}" if self.where else problem
        super().__init__(f"{text}; {remedy}" if remedy else text)
