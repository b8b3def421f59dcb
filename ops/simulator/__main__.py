"""`python -m ops.simulator`: the same as `payouts rail-simulator`."""

from ops.cli.simulator import simulator_command

if __name__ == "__main__":
    simulator_command()
