"""Students: what one is, how a teacher is distilled into one, how a pipeline is imported as one, how one is loaded."""

from redif_sdk.distill.student.base import Student
from redif_sdk.distill.student.decision import check_run, check_teacher, pool_size
from redif_sdk.distill.student.distilling import check_targets, distill, recorded, sample_pool, training_folder
from redif_sdk.distill.student.importing import import_pipeline
from redif_sdk.distill.student.loading import load_student

__all__ = [
    "Student",
    "check_run",
    "check_targets",
    "check_teacher",
    "distill",
    "import_pipeline",
    "load_student",
    "pool_size",
    "recorded",
    "sample_pool",
    "training_folder",
]
