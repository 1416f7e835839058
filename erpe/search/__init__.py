"""Run the two jobs: `tune` searches one study, `run_study` compares arms."""
