-- Argo CD's health check for AuditLogSweepers: put it into argocd-cm under the key
-- resource.customizations.health.auditlog.dev_AuditLogSweeper
local health = {status = "Progressing", message = "No operator has looked at it yet"}
if obj.status == nil or obj.status.conditions == nil then
  return health
end
if obj.status.observedGeneration ~= obj.metadata.generation then
  health.message = "The operator has not looked at the last edit yet"
  return health
end
local found = {}
for _, condition in ipairs(obj.status.conditions) do
  found[condition.type] = condition
end
local ready = found.Ready
if ready == nil then
  return health
end
health.message = ready.reason .. ": " .. (ready.message or "")
if found.Suspended ~= nil and found.Suspended.status == "True" then
  -- Not "Suspended": that would make the whole Application Suspended (argoproj/argo-cd#19126).
  health.status = "Healthy"
  health.message = "Suspended: no sweep runs"
elseif ready.status == "True" then
  health.status = "Healthy"
elseif ready.status == "False" then
  health.status = "Degraded"
end
return health
