"""Evaluations: each takes a loaded model and returns scores. EVALS holds every evaluation by name.

An evaluation is a file with one subclass of `Evaluation` (base.py), and one line here. The class
also determines its section in recipes, its options in `longreach evaluate`, its place in the report
and the rules of the gate that use it.

    python -c "from longreach.evaluation import EVALS; print(*EVALS)"
"""

from longreach.evaluation.base import Evaluation
from longreach.evaluation.gain import Gain
from longreach.evaluation.harness import Harness
from longreach.evaluation.lost_in_the_middle import LostInTheMiddle
from longreach.evaluation.needle import Needle
from longreach.evaluation.passkey import Passkey
from longreach.evaluation.perplexity import Perplexity
from longreach.evaluation.ruler import Ruler
from longreach.evaluation.sinks import Sinks
from longreach.evaluation.stream_questions import StreamQuestions
from longreach.evaluation.streaming import Streaming

EVALS: dict[str, type[Evaluation]] = {
    Perplexity.name: Perplexity,
    Gain.name: Gain,
    Passkey.name: Passkey,
    Needle.name: Needle,
    LostInTheMiddle.name: LostInTheMiddle,
    Ruler.name: Ruler,
    Streaming.name: Streaming,
    StreamQuestions.name: StreamQuestions,
    Sinks.name: Sinks,
    Harness.name: Harness,
}
