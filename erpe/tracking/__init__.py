"""Bring a study to MLflow, as its image. The only package that knows MLflow.

tracker.py       what a driver calls, its thread; `sync`      history.py         what a driver saw, kept with a trial
image.py         what MLflow should show: `desired`           comparison.py      what it shows, and what is left to do
publisher.py     a step: what is left to do is done          mlflow_calls.py    the calls, each repeatable
marks.py         how far a run is                             cursor.py          how far a server has a study
waiting.py       what is not there yet, MLflow not asked      relocation.py      a store that moved, with plugin.py
artifacts.py     files, figures, plots, the champion          ui_views.py        how MLflow shows a study
connection.py    is it there, and is it MLflow                pyfunc.py          the champion, loaded again
deletion.py      removes runs                                 provenance.py      which code, versions and machine
study_tags.py    tags of every run                            figures.py         pictures of a trial
spool.py         what erpe 0.1.0 kept of trials on their way
"""
