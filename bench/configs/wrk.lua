-- What wrk has measured, as one line of JSON.
done = function(summary, latency, requests)
   local errors = summary.errors
   io.write(string.format(
      '\nreport {"requests":%d,"seconds":%f,"failed":%d,"p50":%f,"p99":%f,"p999":%f}\n',
      summary.requests - errors.status, summary.duration / 1e6,
      errors.connect + errors.read + errors.write + errors.timeout + errors.status,
      latency:percentile(50) / 1e6, latency:percentile(99) / 1e6, latency:percentile(99.9) / 1e6))
end
