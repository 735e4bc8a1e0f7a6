-- Tokens for the requests that nginx proxies.

local balancer = require "ngx.balancer"
local cjson = require "cjson.safe"

local tokens = ngx.shared.tokens
local token_url = {{printf "%q" .TokenURL}}

-- {{if eq (len .Clients) 1}}The only client.{{else if .Pool}}A request gets one of them at random.{{else}}By the Host of a request.{{end}}
local clients = {
{{- range $i, $c := .Clients}}
    {{if and (not $.Pool) (gt (len $.Clients) 1)}}[{{printf "%q" $c.Host}}] = {{end}}{ name = "c{{$i}}", id = {{printf "%q" $c.ID}}, secret = {{printf "%q" $c.Secret}}, tenant = {{printf "%q" $c.Tenant}}, upstream = {{printf "%q" $c.Upstream}} },
{{- end}}
}
{{- if gt (len .Clients) 1}}
for _, client in pairs(clients) do
    local address, port = client.upstream:match("^(.*):(%d+)$")
    client.address, client.port = address, tonumber(port)
end
{{- end}}

-- post sends a form to the token endpoint. Debian has no HTTP client for nginx's Lua, and
-- a subrequest isn't possible in a timer. HTTP/1.0, so that the answer is never chunked.
local function post(form, user, password)
    local scheme, host, port, path = token_url:match("^(https?)://([^:/]+):?(%d*)(.*)$")
    local sock = ngx.socket.tcp()
    sock:settimeouts(2000, 2000, 5000)
    local ok, err = sock:connect(host, tonumber(port) or (scheme == "https" and 443 or 80))
    if ok and scheme == "https" then
        ok, err = sock:sslhandshake(nil, host, true)
    end
    if not ok then
        return nil, err
    end

    sock:send {
        "POST ", path, " HTTP/1.0\r\n",
        "Host: ", host, port ~= "" and ":" or "", port, "\r\n",
        "Authorization: Basic ", ngx.encode_base64(user .. ":" .. password), "\r\n",
        "Content-Type: application/x-www-form-urlencoded\r\n",
        "Content-Length: ", #form, "\r\n",
        "Accept: application/json\r\n\r\n", form,
    }
    local answer, err = sock:receive("*a")
    sock:close()
    if not answer then
        return nil, err
    end
    local head, body = answer:match("^(.-\r\n)\r\n(.*)$")
    if not head then
        return nil, "no HTTP answer"
    end
    return {
        status = tonumber(head:match("^HTTP/%d%.%d (%d+)")),
        retry_after = tonumber(head:lower():match("\r\nretry%-after: *(%d+)\r\n")),
        body = body,
    }
end

-- fetch gets a new token and stores it. After a failure, the next try is due in a second,
-- or when the token endpoint says.
local function fetch(client)
    local res, err = post("grant_type=client_credentials",
        ngx.escape_uri(client.id), ngx.escape_uri(client.secret))
    local grant = res and res.status == 200 and cjson.decode(res.body)
    if not grant or not grant.access_token then
        ngx.log(ngx.ERR, "no token for ", client.name, ": ", err or res.status)
        local pause = res and res.retry_after or 1
        tokens:set("failed:" .. client.name, ngx.now() + pause, pause + 10)
        return
    end

    -- It is renewed when a fifth of its life is left, at most 30 s. It is used until 1 s
    -- before its end. The flags of an entry keep the second in which the renewal is due.
    local life = tonumber(grant.expires_in) or 60
    local due = math.floor(ngx.now() + life - math.min(30, life / 5))
    tokens:set(client.name, grant.access_token, math.max(1, life - 1), due)
    tokens:set("young:" .. client.name, true, math.min(10, life / 2))
    tokens:delete("failed:" .. client.name)
end

-- renew has a timer get a new token in the background, unless there is a young one, or a
-- worker is at it, or the last try was just now. So no caller pays for a renewal.
local function renew(client)
    local lock = "lock:" .. client.name
    if ngx.now() < (tokens:get("failed:" .. client.name) or 0) or not tokens:add(lock, true, 15) then
        return
    end
    -- Another's token may have come between the caller's look and the lock.
    if tokens:get("young:" .. client.name) then
        tokens:delete(lock)
        return
    end
    local ok, err = ngx.timer.at(0, function()
        local ok, err = pcall(fetch, client)
        if not ok then
            ngx.log(ngx.ERR, "no token for ", client.name, ": ", err)
        end
        tokens:delete(lock)
    end)
    if not ok then
        tokens:delete(lock)
        ngx.log(ngx.ERR, "no timer for a renewal: ", err)
    end
end

-- obtain waits for the token of a client that has none. If the last token request has
-- failed, the caller is told at once, while the next one is tried.
local function obtain(client)
    local deadline, step = ngx.now() + 10, 0.01
    repeat
        renew(client)
        if tokens:get("failed:" .. client.name) then
            return nil
        end
        ngx.sleep(step)
        step = math.min(2 * step, 0.1)
        local token = tokens:get(client.name)
    until token or ngx.now() > deadline
    return (tokens:get(client.name))
end

local gateway = {}

function gateway.authorize()
    local client = clients[{{if eq (len .Clients) 1}}1{{else if .Pool}}math.random(#clients){{else}}ngx.var.host{{end}}]
    if not client then
        return ngx.exit(421)
    end
    local token, due = tokens:get(client.name)
    if not token then
        token = obtain(client)
    elseif ngx.now() >= due then
        renew(client)
    end
    if not token then
        return ngx.exit(503)
    end
    ngx.ctx.client, ngx.ctx.token = client, token
    ngx.req.set_header("Authorization", "Bearer " .. token)
    ngx.req.set_header("X-Tenant", client.tenant)
end

-- balance sends a request to the upstream of its client.
function gateway.balance()
    local client = ngx.ctx.client
    assert(balancer.set_current_peer(client.address, client.port))
end

-- judge renews a token that the upstream refuses. If it is young, the refusal is rather
-- about the request, and nothing is done. Until there is a new one, the old one is used.
function gateway.judge()
    local client = ngx.ctx.client
    if ngx.status == 401 and client and tokens:get(client.name) == ngx.ctx.token then
        renew(client)
    end
end

return gateway
