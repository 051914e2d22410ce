-- Laravel 13.26.1; 12.67.0 makes the same
-- Command: php artisan migrate --pretend
-- Run: the schema builder of the framework's source on PHP 8.2, with polyfills of newer functions, without artisan.
-- The migration:
--
--   Schema::create('audit_logs', function (Blueprint $table) {
--       $table->id();
--       $table->string('actor');
--       $table->string('action');
--       $table->timestamp('started_at')->index();
--       $table->timestamp('completed_at')->nullable();
--       $table->enum('status', ['success', 'failure', 'timeout'])->nullable();
--       $table->timestamps();
--   });

create table "audit_logs" ("id" bigserial not null primary key, "actor" varchar(255) not null, "action" varchar(255) not null, "started_at" timestamp(0) without time zone not null, "completed_at" timestamp(0) without time zone null, "status" varchar(255) check ("status" in ('success', 'failure', 'timeout')) null, "created_at" timestamp(0) without time zone null, "updated_at" timestamp(0) without time zone null);
create index "audit_logs_started_at_index" on "audit_logs" ("started_at");
