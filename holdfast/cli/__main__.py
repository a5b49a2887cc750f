"""`python -m holdfast.cli` is the `holdfast` command."""

from holdfast.cli.dispatch import main

raise SystemExit(main())
