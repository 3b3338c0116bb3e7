# Compares what the Autobahn suite found with what is expected, and says how
# each case that differs went.
#
#   verdict.py SIDE INDEX EXPECTED      SIDE is `server` or `client`
#
# Exit status: 0 when every case went as expected and none is missing.
import collections
import json
import sys

side, index, expected = sys.argv[1:]
with open(index) as file:
    agents = json.load(file)
with open(expected) as file:
    expected = json.load(file)

if len(agents) != 1:
    sys.exit(f"{index} is about {len(agents)} agents instead of one")
(cases,) = agents.values()
exceptions = expected[side]
wrong = []


def order(case):
    return [int(number) for number in case.split(".")]


for case, found in sorted(cases.items(), key=lambda item: order(item[0])):
    found = [found["behavior"], found["behaviorClose"]]
    wanted = exceptions.get(case, ["OK", "OK"])
    if found != wanted:
        wrong.append(f"case {case}: {' / '.join(found)}, expected {' / '.join(wanted)}")
for case in exceptions.keys() - cases.keys():
    wrong.append(f"case {case} was not run")
if len(cases) != expected["cases"]:
    wrong.append(f"{len(cases)} cases were run, expected {expected['cases']}")

count = collections.Counter(found["behavior"] for found in cases.values())
closes = collections.Counter(found["behaviorClose"] for found in cases.values())
table = ", ".join(f"{number} {word}" for word, number in count.most_common())
ends = ", ".join(f"{number} {word}" for word, number in closes.most_common())
print(f"{side}: {len(cases)} cases: {table}; closing: {ends}")
for line in wrong:
    print(f"  {line}")
if wrong:
    sys.exit(1)
