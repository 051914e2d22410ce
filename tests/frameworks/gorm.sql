-- GORM 1.31.2 with gorm.io/driver/postgres 1.6.3
-- Run: db.AutoMigrate(&AuditLog{})
-- The model; the statements are those that its logger gets, without the SELECT:
--
--   type AuditLog struct {
--       gorm.Model
--       Actor       string    `gorm:"not null"`
--       Action      string    `gorm:"not null"`
--       StartedAt   time.Time `gorm:"not null;index"`
--       CompletedAt *time.Time
--       ResultKind  *string `gorm:"size:16"`
--   }

CREATE TABLE "audit_logs" ("id" bigserial,"created_at" timestamptz,"updated_at" timestamptz,"deleted_at" timestamptz,"actor" text NOT NULL,"action" text NOT NULL,"started_at" timestamptz NOT NULL,"completed_at" timestamptz,"result_kind" varchar(16),PRIMARY KEY ("id"));
CREATE INDEX IF NOT EXISTS "idx_audit_logs_started_at" ON "audit_logs" ("started_at");
CREATE INDEX IF NOT EXISTS "idx_audit_logs_deleted_at" ON "audit_logs" ("deleted_at");
