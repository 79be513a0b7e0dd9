"""The student that the other examples use where they are given none: mini-sd's of 4 steps, trained on a GPU.

The repository holds its weights; the first call exports them to ONNX, which takes a minute or two.
"""

from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "build" / "examples" / "mini-sd-4"


def shipped_student(folder: Path = FOLDER) -> Path:
    """The folder of the exported student. Only the first call imports torch."""
    if not any(folder.glob("onnx/generator.*")):
        from redif_sdk.distill import Teacher
        from redif_sdk.distill.shipped.students import shipped_student
        from redif_sdk.export import export

        print(f"exporting the shipped student to {folder}; the next run finds it there")
        shipped_student(Teacher.load("mini-sd"), 4).save_pretrained(folder, overwrite=folder.exists())
        export(folder)
    return folder
