-- The load of `wrk`: accounts in turn, each answer checked.
local accounts = 1000
local requests, asked, last = {}, {}, 0
local threads = {}

answered, wrong = 0, 0 -- globals, so that done() can have them from each thread

function setup(thread)
   table.insert(threads, thread)
end

function init(args)
   for number = 1, accounts do
      requests[number] = wrk.format("GET", "/accounts/" .. number)
      asked[number] = 0
   end
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
   io.write(string.format("found %d %d %d %d %d %d\n", right, false_, broken, summary.duration,
      latency:percentile(50), latency:percentile(99)))
end
