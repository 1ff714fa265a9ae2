"""The framework: what a transport promises, how a URI finds it, and the guard that holds it to its word.

An author needs this package, `kvmmig.errors`, and for convenience `kvmmig.transport.toolkit` and
`kvmmig.units`; ``transports/README.md`` is the guide.
"""

from kvmmig.transport.contract import AnyChannel as AnyChannel
from kvmmig.transport.contract import Channel as Channel
from kvmmig.transport.contract import Knob as Knob
from kvmmig.transport.contract import Listener as Listener
from kvmmig.transport.contract import Option as Option
from kvmmig.transport.contract import RandomAccessChannel as RandomAccessChannel
from kvmmig.transport.contract import ReceiveChannel as ReceiveChannel
from kvmmig.transport.contract import SendChannel as SendChannel
from kvmmig.transport.contract import Transport as Transport
from kvmmig.transport.phases import on_phase as on_phase
from kvmmig.transport.registry import register as register
from kvmmig.transport.registry import register_wrapper as register_wrapper
from kvmmig.transport.registry import transport_for as transport_for
from kvmmig.transport.uri import TransportURI as TransportURI
from kvmmig.transport.wrapper import PassingChannel as PassingChannel
from kvmmig.transport.wrapper import Side as Side
from kvmmig.transport.wrapper import Wrapper as Wrapper
