"""Bring a study to MLflow, as its image. The only package that knows MLflow.

tracker.py       what a driver calls; `sync`, `waiting`       history.py         what a driver saw, kept with a trial
image.py         what MLflow should show: `desired`           comparison.py      what it shows, and what is left to do
publisher.py     as often as it takes; the cursor             mlflow_calls.py    the calls, each repeatable
artifacts.py     files, figures, plots, the champion          ui_views.py        how MLflow shows a study
connection.py    is it there, and is it MLflow                pyfunc.py          the champion, loaded again
deletion.py      removes runs                                 provenance.py      which code, versions and machine
study_tags.py    tags of every run                            figures.py         pictures of a trial
spool.py         what erpe 0.1.0 kept of trials on their way
"""
