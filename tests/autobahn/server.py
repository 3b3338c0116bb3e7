# The Autobahn suite's fuzzing server, for Python 2.7, with two differences
# from `wstest -m fuzzingserver`: it listens on the loopback interface only, at
# a port of the system's choice, which it prints; and it names the subprotocol
# that our client insists on.
#
#   server.py SPEC
import json
import sys

from autobahntestsuite import choosereactor  # installs it: before anything that uses it
from autobahntestsuite import fuzzing
from twisted.internet import reactor

SUBPROTOCOL = u"trunkline.v1"


class Server(fuzzing.FuzzingServerProtocol):
    def onConnect(self, request):
        fuzzing.FuzzingServerProtocol.onConnect(self, request)
        return SUBPROTOCOL


with open(sys.argv[1]) as spec:
    spec = json.load(spec)
factory = fuzzing.FuzzingServerFactory(spec)
factory.protocol = Server
port = reactor.listenTCP(0, factory, interface="127.0.0.1").getHost().port
url = "ws://127.0.0.1:%d" % port
factory.setSessionParameters(url=url, protocols=[SUBPROTOCOL], server="autobahn")
print("listening on %s" % url)
sys.stdout.flush()
reactor.run()
