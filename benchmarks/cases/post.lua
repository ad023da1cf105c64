-- wrk posts the body that is its argument.
function init(args)
  wrk.method = "POST"
  wrk.body = args[1]
end
