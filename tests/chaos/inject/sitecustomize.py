"""Python imports this at the start of every process that has this folder on its path."""

import accidents

accidents.arm()
