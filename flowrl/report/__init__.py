"""`flowrl report RUN`: a run as one page that opens anywhere, without network, script or library."""

from flowrl.report.page import write_report
from flowrl.report.read import Run, read_run

__all__ = ["Run", "read_run", "write_report"]
