"""How the shipped teachers were made: data sets, training, judges, publishing. Not part of the wheel."""
