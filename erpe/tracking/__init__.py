"""Bring a study to MLflow, as its image. The only package that knows MLflow.

outbox.py        events of a study, one append-only file      tracker.py         what a study calls
publisher.py     carries the file to the server               projection.py      events -> runs, repeatable
artifacts.py     files, figures, plots, the champion          ui_views.py        how MLflow shows a study
connection.py    is it there, and is it MLflow                pyfunc.py          the champion, loaded again
run_state.py     what an outbox says of each run              logged_metrics.py  what MLflow has of its measures
verify.py        has MLflow what it acknowledged              deletion.py        removes runs
study_logger.py  what of a study is logged                    backfill.py        logs again what is missing
provenance.py    which code, versions and machine             figures.py         pictures of a trial
"""
