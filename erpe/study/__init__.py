"""Define a study and record what happens in it: specification, search space, database."""
