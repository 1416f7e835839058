"""From events to MLflow: a spool on disk, a sender in the background. The only room that knows mlflow.

spool.py       events of a study, one append-only file        tracker.py    what a study calls
sender.py      carries the file to the server, however long   projection.py events -> runs, repeatable
artifacts.py   files, figures, plots, the champion            view.py       how MLflow shows a study
server.py      is it there, and is it MLflow                  pyfunc.py     the champion, loaded again
known.py       what a spool tells of each run                 points.py     what MLflow has of its measures
audit.py       has MLflow what it acknowledged                reading.py    from MLflow to tables
provenance.py  which code, versions and machine
"""
