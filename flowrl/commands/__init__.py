"""One file for each command, or a few that belong together: `add` describes them to the parser, `run_NAME` does the work.

Imports of anything heavy stay inside the functions, so that `flowrl --help` answers at once.
"""
