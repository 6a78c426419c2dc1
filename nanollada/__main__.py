"`python -m nanollada` is the command `nanollada`."
from nanollada.cli import main
raise SystemExit(main())
