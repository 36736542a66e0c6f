"""`python -m lwm` is `lwm`."""

from lwm.cli.main import main

main()
