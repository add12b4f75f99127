from trainfw.cli import command

command()
