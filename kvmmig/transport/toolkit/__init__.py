"""What the built-in transports are made of, for the authors of other ones."""

from kvmmig.transport.toolkit import tcpsockets as tcpsockets
from kvmmig.transport.toolkit import unixsockets as unixsockets
from kvmmig.transport.toolkit.interrupts import Interrupts as Interrupts
from kvmmig.transport.toolkit.one_at_a_time import OneAtATime as OneAtATime
from kvmmig.transport.toolkit.prefix import prefix as prefix
from kvmmig.transport.toolkit.sockets import SOCKET_WORDS as SOCKET_WORDS
from kvmmig.transport.toolkit.sockets import SocketChannel as SocketChannel
from kvmmig.transport.toolkit.sockets import SocketListener as SocketListener
from kvmmig.transport.toolkit.tcpchannel import TCP_WORDS as TCP_WORDS
from kvmmig.transport.toolkit.tcpchannel import TcpChannel as TcpChannel
from kvmmig.transport.toolkit.tcpchannel import address as address
from kvmmig.transport.toolkit.words import kind as kind
from kvmmig.transport.toolkit.words import why as why
from kvmmig.transport.toolkit.workers import Workers as Workers
from kvmmig.transport.toolkit.workers import attempt as attempt
from kvmmig.transport.toolkit.workers import open_in_thread as open_in_thread
