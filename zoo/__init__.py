"""How the shipped teachers were made: data sets, training, evaluation, publishing. Not part of the wheel."""
