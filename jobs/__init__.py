"""For: the commands, `python -m jobs.<name>`; each a few lines over the other rooms.
Takes the command line and the environment; gives exit codes and printed lines.
May import: everything.
Never: logic that another command needs too (that belongs to a room).
"""
