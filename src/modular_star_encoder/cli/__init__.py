"""The command `mose`: each module parses the commands of one group and calls one function of a room for each."""
