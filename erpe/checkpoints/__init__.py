"""Keep the files of trials where hosts share no folder."""
