"""The comparison of distillation methods: run.py trains and evaluates the cells, judges.py has the evaluation."""
