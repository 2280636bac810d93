"""Python runs this as it starts, in processes whose PYTHONPATH has this folder."""

import stand_in

stand_in.install()
