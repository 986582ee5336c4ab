-- The load of `wrk`: accounts in turn, each answer checked. It begins when each client
-- has been connected for a second, because uvloop accepts one client in each iteration.
local accounts, pause = 1000, 1000 -- milliseconds
local requests, asked, last = {}, {}, 0
local threads, not_connected = {}, 0

answered, wrong = 0, 0 -- globals, so that done() can have them from each thread

function setup(thread)
   table.insert(threads, thread)
end

function init(args)
   not_connected = tonumber(args[1])
   for number = 1, accounts do
      requests[number] = wrk.format("GET", "/accounts/" .. number)
      asked[number] = 0
   end
end

function delay()
   if not_connected == 0 then
      return 0
   end
   not_connected = not_connected - 1
   return pause
end

function request()
   last = last % accounts + 1
   asked[last] = asked[last] + 1
   return requests[last]
end

function response(status, headers, body)
   local number, owner = body:match('^{"number":(%d+),"owner":"owner of (%d+)"}$')
   local open = asked[tonumber(number)]
   if status ~= 200 or number ~= owner or open == nil or open == 0 then
      wrong = wrong + 1
   else
      asked[tonumber(number)] = open - 1
      answered = answered + 1
   end
end

function done(summary, latency, _)
   local right, false_ = 0, 0
   for _, thread in ipairs(threads) do
      right, false_ = right + thread:get("answered"), false_ + thread:get("wrong")
   end
   local errors = summary.errors
   local broken = errors.connect + errors.read + errors.write + errors.timeout
   io.write(string.format("found %d %d %d %d %d %d\n", right, false_, broken,
      summary.duration - pause * 1000, latency:percentile(50), latency:percentile(99)))
end
