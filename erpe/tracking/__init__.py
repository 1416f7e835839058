"""From events to MLflow: a spool on disk, a sender in the background. The only room that knows mlflow.

spool.py       events of a study in one append-only file        tracker.py    what a study calls
sender.py      carries the file to the server, for ever trying  projection.py events -> runs, repeatable
artifacts.py   figures, checkpoints, plots, the champion        server.py     is it there, and is it MLflow
provenance.py  which code, versions and machine                 pyfunc.py     the champion, loaded again
"""
