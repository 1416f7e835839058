"""The search: Ray Tune schedules Optuna's trials. The only room that knows ray and optuna.

space -> study -> ledger (Optuna's database, the only truth) -> conductor -> scheduling (Ray) -> tune
"""
