"""Run trials: the controller of a study, fair shares between arms, executors."""
