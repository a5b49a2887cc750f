"""Rehearse faults: break a real job as a schedule says, and judge whether it lost or falsified anything."""

from holdfast.elastic.faults.report import report_lines
from holdfast.elastic.faults.schedule import Fault, Faults, Job, Plan, Schedule, load_plan, save_plan
from holdfast.elastic.faults.stage import rehearse
from holdfast.elastic.faults.verdict import Outcome, Verdict

__all__ = [
    "Fault",
    "Faults",
    "Job",
    "Outcome",
    "Plan",
    "Schedule",
    "Verdict",
    "load_plan",
    "rehearse",
    "report_lines",
    "save_plan",
]
