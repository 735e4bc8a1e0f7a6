-- Tokens for the requests that HAProxy proxies.

local cjson = require "cjson.safe"

local token_url = {{printf "%q" .TokenURL}}
local tokens = {{printf "%q" .Dir}} .. "/haproxy-tokens.map"

-- A client has these fields, too, when it is in use: its token, when that was issued,
-- its keeper, since when the keeper waits for a token, and whether the last try failed.
local clients = {
{{- range $i, $c := .Clients}}
    c{{$i}} = { name = "c{{$i}}", id = {{printf "%q" $c.ID}}, secret = {{printf "%q" $c.Secret}} },
{{- end}}
}

local function escape(text)
    return (text:gsub("[^%w%-._~]", function(c) return string.format("%%%02X", c:byte()) end))
end

-- A token is removed 1 s before its end, if none has replaced it by then.
local function expire(client, token, life)
    core.register_task(function()
        core.msleep(math.max(1000, (life - 1) * 1000))
        if client.token == token then
            client.token = nil
            core.del_map(tokens, client.name)
        end
    end)
end

-- fetch gets a new token, and returns the seconds until the next is due: when a fifth of
-- its life is left, at most 30 s. After a failure it is 1 s, or what the server says.
local function fetch(client)
    client.since = core.now().sec
    local res = core.httpclient():post {
        url = token_url,
        headers = {
            ["content-type"] = { "application/x-www-form-urlencoded" },
            ["accept"] = { "application/json" },
        },
        body = "grant_type=client_credentials&client_id=" .. escape(client.id)
            .. "&client_secret=" .. escape(client.secret),
        timeout = 5000, -- of each of the four tries that HAProxy's client makes
    }
    client.since = nil

    local grant = res and res.status == 200 and cjson.decode(res.body)
    if not grant or not grant.access_token then
        client.failed = true
        core.Alert("no token for " .. client.name .. ": " .. tostring(res and res.status))
        local retry_after = res and res.headers and res.headers["retry-after"]
        return tonumber(retry_after and retry_after[0]) or 1
    end
    client.failed = false
    client.token, client.issued = grant.access_token, core.now().sec
    core.set_map(tokens, client.name, client.token)
    local life = tonumber(grant.expires_in) or 60
    expire(client, client.token, life)
    return math.max(1, life - math.min(30, life / 5))
end

-- keep starts a task that gets one token after another for a client. It ends when
-- another has replaced it.
local function keep(client)
    local keeper = {}
    client.keeper, client.since = keeper, core.now().sec
    core.register_task(function()
        while client.keeper == keeper do
            core.msleep(math.floor(fetch(client) * 1000))
        end
    end)
end

-- obtain waits for the token of a client that has none. If the last token request has
-- failed, or the present one takes 5 s, the caller is told at once.
core.register_action("obtain", { "http-req" }, function(txn)
    local client = clients[txn:get_var("txn.client")]
    if not client.keeper then
        keep(client)
    end
    local step = 10
    while not client.token and not client.failed
        and core.now().sec < (client.since or core.now().sec) + 5 do
        core.msleep(step)
        step = math.min(2 * step, 100)
    end
    if client.token then
        txn:set_var("txn.token", client.token)
    end
end)

-- judge replaces a token that the upstream refuses, but not one that is less than 10 s
-- old: then the refusal is about the request. Until there is a new one, the old one is used.
core.register_action("judge", { "http-res" }, function(txn)
    local client = clients[txn:get_var("txn.client")]
    if client and client.token and client.token == txn:get_var("txn.token")
        and core.now().sec >= client.issued + 10
        and not client.since and not client.failed then
        client.issued = core.now().sec -- one replacement for many refusals
        keep(client)
    end
end)
