"""Makes the runner's sources importable as the package that the daemon makes of them."""

from __future__ import annotations

import sys
import types
from pathlib import Path

package = types.ModuleType("iqoqo_runner")
package.__path__ = [str(Path(__file__).parents[2] / "src" / "exec" / "runner")]
sys.modules["iqoqo_runner"] = package
