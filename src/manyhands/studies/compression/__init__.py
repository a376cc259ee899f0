"""What compressed gradients cost in accuracy, and what they save, in bytes and on a slow link.

`settings` are the recommended ones of each scheme, with the tasks they were found on; `design` makes the study of them,
`report` reads its rows.
"""
