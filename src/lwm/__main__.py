"""Run the command line with `python -m lwm`."""

from lwm.cli.main import main

main()
