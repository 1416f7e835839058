"""One trial: data in, a trained and measured model out. Pure torch; nothing of ray, optuna or mlflow."""
