"""The comparison of distillation methods: run.py trains and judges the cells, judges.py is who judges."""
